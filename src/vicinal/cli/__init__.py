"""The `vicinal` command: one short file per subcommand, which parses, calls and prints."""
