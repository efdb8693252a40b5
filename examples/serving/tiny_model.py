"""Write the tiny model of the package in a form that vLLM serves: a tokenizer and so on beside it.

python examples/serving/tiny_model.py build/tiny
"""

import json
import shutil
import sys
from pathlib import Path

from visionpulse.data import tiny, trail

SPECIAL = {
    trail.VISION_START: "<|vision_start|>",
    trail.IMAGE: "<|image_pad|>",
    trail.VISION_END: "<|vision_end|>",
    trail.VIDEO: "<|video_pad|>",
}
TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %} {{ part['text'] }}"
    "{% else %} <|vision_start|> <|image_pad|> <|vision_end|>"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
CELLS = 40 * 40  # the largest picture, in visual tokens


def words():
    """The word of each token."""
    named = dict(enumerate(trail.words(range(trail.VOCABULARY)))) | SPECIAL
    return [named[token] for token in range(trail.VOCABULARY)]


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: token for token, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="END", pad_token="<pad>",
        unk_token="<pad>", additional_special_tokens=list(SPECIAL.values()),
    ).save_pretrained(folder)  # fmt: skip
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_processor(folder, cells=CELLS):
    """A cell of the picture is one patch and one visual token."""
    pixels = trail.CELL * trail.CELL
    common = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": trail.CELL, "merge_size": 1, "temporal_patch_size": 1,
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"shortest_edge": 4 * pixels, "longest_edge": cells * pixels},
    }  # fmt: skip
    kinds = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, kind in kinds.items():
        (folder / name).write_text(json.dumps(common | kind, indent=2))


def main(folder):
    folder = Path(folder)
    shutil.copytree(tiny.FOLDER, folder, dirs_exist_ok=True)
    write_tokenizer(folder)
    write_processor(folder)
    return folder


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
