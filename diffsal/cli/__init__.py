"""The command line: parses and calls, nothing else. Modules that need torch load on use."""
