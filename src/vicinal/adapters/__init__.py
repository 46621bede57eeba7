"""Other people's models on our operator: one module per host, imported only by those who ask for it."""
