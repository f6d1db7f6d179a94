"""The published systems on their tasks: a command and a table each."""
