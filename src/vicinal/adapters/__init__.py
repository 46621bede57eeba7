"""Other people's models on our operator; each file is imported only when asked for."""
