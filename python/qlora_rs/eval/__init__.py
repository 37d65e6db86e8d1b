"""What a model is worth: perplexity on a text, and answers to a prompt."""

from __future__ import annotations

from qlora_rs.eval.generation import Generation, generate
from qlora_rs.eval.mode import evaluating
from qlora_rs.eval.perplexity import Perplexity, perplexity

__all__ = ["Generation", "Perplexity", "evaluating", "generate", "perplexity"]
