"""A conversation on one cache: later turns may bring new pictures, all of one budget.

python examples/multi_turn.py kitchen.jpg garden.jpg
"""

import sys

import visionpulse as vp

MODEL = "llava-hf/llava-1.5-7b-hf"


def main(model, processor, *pictures, tokens=64):
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config())
    talk, answers = [], []
    with vp.patch(model, "10pct") as session:
        for picture in pictures:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": "And here?"}]
            talk.append({"role": "user", "content": content})
            inputs = processor.apply_chat_template(
                talk, add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            ).to(model.device)  # fmt: skip
            if "pixel_values" in inputs:  # those of the earlier turns are in the cache
                inputs["pixel_values"] = inputs["pixel_values"][-1:]
            out = model.generate(**inputs, past_key_values=cache, max_new_tokens=tokens)
            text = processor.decode(
                out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            talk.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
            answers.append(out)
            print(f"{text}\n  {session.stats}")
            session.reset_stats()
    return answers


if __name__ == "__main__":
    from transformers import AutoModelForImageTextToText, AutoProcessor

    main(
        AutoModelForImageTextToText.from_pretrained(MODEL, dtype="auto", device_map="auto"),
        AutoProcessor.from_pretrained(MODEL),
        *sys.argv[1:],
    )
