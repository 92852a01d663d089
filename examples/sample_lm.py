"""Continue a text with a model that train_lm.py trained.

    python examples/sample_lm.py runs/gru --prompt "def main("

The text appears as it is drawn. Each token costs the same time and memory, however long
the text is.
"""

import pathlib
import secrets
import sys

import jax
import numpy as np
import tyro

import pararnn
from pararnn.training import load_model, stream_text


def main(
    run: tyro.conf.Positional[pathlib.Path],
    prompt: str = "",
    tokens: int = 500,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int | None = None,
    newest: bool = False,
) -> int:
    """Continue a text.

    Args:
        run: Folder of a training run.
        prompt: The text to continue. If empty, a new document begins.
        tokens: How many tokens to draw.
        temperature: 0 always takes the likeliest token.
        top_k: Draw among this many of the likeliest tokens.
        top_p: Draw among the likeliest tokens, up to this probability together.
        seed: Seed of the draw. Defaults to another one at every call.
        newest: Use the newest checkpoint, not the one that validated best.
    """
    try:
        model, tokenizer = load_model(run, best=not newest)
        start = np.concatenate([[tokenizer.begin], tokenizer.encode(prompt)])
        key = jax.random.key(secrets.randbits(32) if seed is None else seed)
        drawn = pararnn.generate(
            model,
            start,
            max_tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=(tokenizer.begin,),
            key=key,
        )
    except (FileNotFoundError, ValueError) as error:
        print(f"sample_lm.py: {error}", file=sys.stderr)
        return 1
    print(prompt, end="")
    for piece in stream_text(tokenizer, drawn):
        print(piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
