"""The tour: what the library does, shown on one photograph, and the pictures that `vicinal show` draws."""
