"""Several questions in one batch, each with its own pictures or none: rows keep their own budget.

python examples/batch.py one.jpg two.jpg three.jpg
"""

import sys

import visionpulse as vp

MODEL = "Qwen/Qwen3-VL-4B-Instruct"


def main(model, processor, *pictures, question="What is in the picture?", tokens=64):
    ask = [[{"type": "image", "image": p}, {"type": "text", "text": question}] for p in pictures]
    ask.append([{"type": "text", "text": "Say hello."}])  # a row without a picture stays dense
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}] for content in ask],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        padding=True, padding_side="left",
    ).to(model.device)  # fmt: skip
    session = vp.patch(model, "5pct")
    out = model.generate(**inputs, max_new_tokens=tokens)
    for row in out[:, inputs["input_ids"].shape[1] :]:
        print("-", processor.decode(row, skip_special_tokens=True))
    print(session.stats)
    session.unpatch()
    return out


if __name__ == "__main__":
    from transformers import AutoModelForImageTextToText, AutoProcessor

    main(
        AutoModelForImageTextToText.from_pretrained(MODEL, dtype="auto", device_map="auto"),
        AutoProcessor.from_pretrained(MODEL),
        *sys.argv[1:],
    )
