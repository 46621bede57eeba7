"""`python -m vicinal.measure`: see `vicinal.measure.command`."""

import sys

from vicinal.measure.command import main

sys.exit(main(sys.argv[1:]))
