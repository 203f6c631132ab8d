"""GPT-2: the model, the text it trains on, and its training loop."""
