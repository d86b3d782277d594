"""Other people's files as they are, and our own whole or not at all. Nothing here imports the other
rooms."""
