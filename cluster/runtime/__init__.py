"""Where the program runs: sessions, resources and actors of Ray."""
