"""GPT-2: the model, its checkpoints, the text it trains on (`data`), and its training (`train`)."""

from fastattn.gpt2.checkpoint import load_model, save_model
from fastattn.gpt2.config import GPT2Config, config_of
from fastattn.gpt2.model import GPT2

__all__ = ["GPT2", "GPT2Config", "config_of", "load_model", "save_model"]
