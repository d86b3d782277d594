"""Other people's files as they are, and our own whole or not at all; imports no other room."""
