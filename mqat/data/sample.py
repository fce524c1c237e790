"""What `mqat verify` runs through a model where no text is given: plain prose, written for it.

Ids without a text would do for finding wrong tensors, but what follows them is anybody's guess, so that
the quantization noise of a good export changes the likeliest token too often to judge by it.
"""

from pathlib import Path

import torch
from torch import Tensor

from mqat.data.tokenizer import check_fits, load_tokenizer

NUM_TOKENS = 256
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_TEXT = """\
The lighthouse stands at the end of a long stone pier, and every evening at sunset the keeper
walks out to it. In winter the waves break over the wall and he has to wait for the tide to fall.
The lamp was lit with oil until 1923, when the town bought a small generator; since then the light
has been electric, and it can be seen from a distance of twenty miles. Ships that come from the
north see two white flashes followed by a pause of ten seconds.

Water boils at 100 degrees Celsius at sea level, but on high mountains it boils at a lower
temperature because the air pressure is lower there. This is why it takes longer to cook rice or
beans in the mountains than it does on the coast. A pressure cooker solves the problem: the lid is
closed tightly, so that steam cannot leave the pot and the pressure rises.

To borrow a book from the library, you need a card. Ask for one at the front desk and bring a
letter with your name and address on it. You may keep a book for three weeks. If nobody else is
waiting for it, you can ask for another three weeks by telephone. Children under the age of twelve
do not have to pay when they bring a book back late.
"""


def sample_tokens(directory: Path, *, vocab_size: int, longest: int) -> Tensor:
    """At most `NUM_TOKENS` tokens of the text, int64 [1, s]; fixed ids where there is no tokenizer.

    Args:
        directory: Of the export, with its tokenizer.
        vocab_size: Of the model.
        longest: Most tokens of a sequence that it can read.

    Raises:
        ValueError: The tokenizer cannot be used, or does not fit the model.
    """
    length = min(NUM_TOKENS, longest)
    if any((directory / name).exists() for name in _TOKENIZER_FILES):
        tokenizer = load_tokenizer(directory)
        check_fits(tokenizer, vocab_size)
        return torch.tensor([tokenizer(_TEXT)["input_ids"][:length]])
    return (torch.arange(length) * 7919 % vocab_size)[None]
