"""The command line: options, what is printed, and the commands themselves."""
