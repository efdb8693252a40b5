"""One picture, one question: patch the model, generate as always.

python examples/single_picture.py photo.jpg "What is on the table?"
"""

import sys

import visionpulse as vp

MODEL = "Qwen/Qwen3-VL-4B-Instruct"


def main(model, processor, picture, question="What is in the picture?", tokens=128):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ).to(model.device)  # fmt: skip
    with vp.patch(model, "10pct") as session:
        out = model.generate(**inputs, max_new_tokens=tokens)
        print(session.stats)
    print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return out


if __name__ == "__main__":
    from transformers import AutoModelForImageTextToText, AutoProcessor

    main(
        AutoModelForImageTextToText.from_pretrained(MODEL, dtype="auto", device_map="auto"),
        AutoProcessor.from_pretrained(MODEL),
        *sys.argv[1:],
    )
