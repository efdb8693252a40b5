"""Real processors of some families, each around a tokenizer and an image processor made here."""

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

IMAGE, VIDEO, START, END = 150, 151, 152, 153  # as in families.py
VOCABULARY = 200


@dataclass(frozen=True)
class Family:
    """How a family's processor is made, and what it makes of two pictures."""

    processor: str
    image_processor: str  # folder of transformers.models, and class
    settings: dict[str, Any]  # of the image processor
    special: dict[int, str]
    picture: str  # in the chat template
    token: str  # stands for one visual token
    counts: tuple[int, int, int]  # tokens of WIDE alone; of WIDE and TALL in one conversation
    named: dict[str, str] | None = None  # attributes of the tokenizer
    options: dict[str, Any] | None = None  # of the processor
    videos: bool = True  # whether it has a processor for videos
    turns: tuple[str, str] = ("<|im_start|>", "<|im_end|>")


WIDE, TALL = (96, 32), (40, 56)  # width and height, in pixels
_QWEN = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>"} | {
    END: "<|vision_end|>", 154: "<|im_start|>", 155: "<|im_end|>",
}  # fmt: skip
_PIXELS = {"shortest_edge": 64, "longest_edge": 8192}
_SQUARE = {"height": 64, "width": 64}


def _qwen(processor: str) -> Family:
    return Family(
        processor,
        "qwen2_vl.Qwen2VLImageProcessorPil",
        {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": _PIXELS},
        _QWEN,
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|image_pad|>",
        (48, 48, 35),  # cells of 8 x 8 pixels
    )


FAMILIES = {
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen("Qwen3VLProcessor"),
    "qwen3_5": _qwen("Qwen3VLProcessor"),
    "glm4v": Family(
        "Glm4vProcessor",
        "glm4v.Glm4vImageProcessorPil",
        {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": _PIXELS},
        {
            IMAGE: "<|image|>", VIDEO: "<|video|>", START: "<|begin_of_image|>",
            END: "<|end_of_image|>", 154: "<|begin_of_video|>", 155: "<|end_of_video|>",
            156: "<|user|>", 157: "<|assistant|>",
        },
        "<|begin_of_image|><|image|><|end_of_image|>",
        "<|image|>",
        (48, 48, 35),
        turns=("", ""),
    ),
    "llava_onevision": Family(
        "LlavaOnevisionProcessor",
        "llava_onevision.LlavaOnevisionImageProcessorPil",
        {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 32]]},
        {IMAGE: "<image>", VIDEO: "<video>", 154: "<|im_start|>", 155: "<|im_end|>"},
        "<image>",
        "<image>",
        (26, 17, 17),  # 16, and the tile without its padding; 16 where there are several
        options={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "internvl": Family(
        "InternVLProcessor",
        "got_ocr2.GotOcr2ImageProcessorPil",
        {"size": _SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        {
            IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", START: "<img>", END: "</img>",
            154: "<|im_start|>", 155: "<|im_end|>",
        },
        "<IMG_CONTEXT>",
        "<IMG_CONTEXT>",
        (64, 64, 48),  # 16 a tile: 3 and 2 tiles, and the whole picture
        named={
            "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
            "start_image_token": "<img>", "end_image_token": "</img>",
        },
        options={"image_seq_length": 16},
    ),
    "gemma3": Family(
        "Gemma3Processor",
        "gemma3.Gemma3ImageProcessorPil",
        {"size": _SQUARE},
        {
            IMAGE: "<image_soft_token>", START: "<start_of_image>", END: "<end_of_image>",
            154: "<start_of_turn>", 155: "<end_of_turn>",
        },
        "<start_of_image>",
        "<image_soft_token>",
        (16, 16, 16),
        named={
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        options={"image_seq_length": 16},
        videos=False,
        turns=("<start_of_turn>", "<end_of_turn>"),
    ),
    "smolvlm": Family(
        "SmolVLMProcessor",
        "smolvlm.SmolVLMImageProcessorPil",
        {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
        {IMAGE: "<image>", VIDEO: "<video>", 154: "<fake_token_around_image>"}
        | {155: "<global-img>", 156: "<end_of_utterance>", 157: "<|im_start|>"}
        | {158 + 2 * row + column: f"<row_{row + 1}_col_{column + 1}>"
           for row in (0, 1) for column in (0, 1)},
        "<image>",
        "<image>",
        (48, 48, 80),  # 16 a tile: 2 and 4 tiles, and the whole picture
        options={"image_seq_len": 16},
        turns=("<|im_start|>", "<end_of_utterance>"),
    ),
}  # fmt: skip


def template(family: Family) -> str:
    """The chat template: turns, and a picture's markup where the message has one."""
    begin, end = family.turns
    return (
        "{% for message in messages %}" + begin + " {{ message['role'] }} "
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + family.picture
        + "{% else %} {{ part['text'] }} {% endif %}{% endfor %}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}" + begin + " assistant {% endif %}"
    )  # fmt: skip


def words(family: Family) -> list[str]:
    """The word of each token."""
    own = {0: "<pad>", 1: "<bos>", 2: "<unk>", 3: "user", 4: "assistant"} | family.special
    return [own.get(token, f"w{token}") for token in range(VOCABULARY)]


def tokenizer(family: Family) -> Any:
    """One token a word; markup is found within words, as in a published tokenizer."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: token for token, word in enumerate(words(family))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(word, special=True) for word in family.special.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>",
        padding_side="left", **({"extra_special_tokens": family.named} if family.named else {}),
    )  # fmt: skip


def processor(family: Family) -> Any:
    """The processor of a family; pictures go through PIL, videos would want torchvision."""
    import transformers

    folder, name = family.image_processor.split(".")  # some are not exported without torchvision
    module = importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}")
    kind = getattr(transformers, family.processor)
    no_videos = {"video_processor": SimpleNamespace(num_frames=1, fps=1)} if family.videos else {}
    with mock.patch.object(kind, "check_argument_for_proper_class"):  # it wants torchvision, too
        return kind(
            image_processor=getattr(module, name)(**family.settings), tokenizer=tokenizer(family),
            chat_template=template(family), **(family.options or {}), **no_videos,
        )  # fmt: skip


def picture(size: tuple[int, int]) -> Any:
    """A picture of two slopes and a stripe, the same on every machine."""
    from PIL import Image

    width, height = size
    made = Image.new("RGB", size)
    for x in range(width):
        for y in range(height):
            stripe = 200 if x % 16 < 4 else 0
            made.putpixel((x, y), (255 * x // width, 255 * y // height, stripe))
    return made


def conversation(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    """One turn with a picture of each size, and a question."""
    parts = [{"type": "image", "image": picture(size)} for size in sizes]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "w20 w21 w22 w23"}]}]
