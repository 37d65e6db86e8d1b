"""What stands beside the weights of a model folder, made of a GGUF file: config.json and tokenizer, for a while."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_rs.checkpoint.folder import write_json
from qlora_rs.checkpoint.gguf_sentencepiece import TokenizerFields
from qlora_rs.checkpoint.gguf_tokenizer import mend_tokenizer
from qlora_rs.checkpoint.source import CONFIG
from qlora_rs.errors import UnsupportedError, first_line, require_extra


class Beside:
    """A temporary folder that is made when it is asked for, and removed with this object.

    Args:
        path: the GGUF file.
        config: ``config.json``.
        tokenizer: what the file says of its tokenizer.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], tokenizer: TokenizerFields) -> None:
        self.path, self.config, self.tokenizer = path, config, tokenizer
        self._folder: Path | None = None
        self._has_tokenizer = False

    def folder(self) -> Path:
        """With ``config.json`` and ``generation_config.json``."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="qlora_rs-gguf-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            write_json(self._folder / CONFIG, dict(self.config))
            tokens = {key: value for key, value in self.config.items() if key.endswith("_token_id")}
            write_json(self._folder / "generation_config.json", tokens)
        return self._folder

    def with_tokenizer(self) -> Path:
        """With the tokenizer and the chat template too, as transformers reads them.

        Raises:
            UnsupportedError: transformers is not installed, or knows no such tokenizer.
        """
        folder = self.folder()
        if not self._has_tokenizer:
            transformers = require_extra("transformers", "transformers", "reading a GGUF file's tokenizer")
            logging = transformers.utils.logging
            verbosity = logging.get_verbosity()
            logging.set_verbosity_error()
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    str(self.path.parent), gguf_file=self.path.name, local_files_only=True, trust_remote_code=False
                )
                tokenizer.save_pretrained(folder)
            except Exception as error:  # whatever a tokenizer's own code raises for what it cannot use
                raise UnsupportedError(
                    f"{self.path}: transformers {transformers.__version__} cannot read its tokenizer: "
                    f"{first_line(error)}"
                ) from None
            finally:
                logging.set_verbosity(verbosity)
            mend_tokenizer(folder, self.tokenizer, int(self.config["vocab_size"]))
            self._has_tokenizer = True
        return folder
