"""The command line: one file per command, each parse -> typed config -> one library call -> print."""
