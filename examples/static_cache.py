"""A static cache and torch.compile: the whole step is one graph, shared by prompts of any length.

    python examples/static_cache.py photo.jpg "What is on the table?"

On a GPU `generate` compiles by itself when the cache is static; nothing else changes.
"""

import sys

import visionpulse as vp

MODEL = "Qwen/Qwen3-VL-4B-Instruct"


def main(model, processor, picture, *questions, tokens=128, length=8192, **options):
    from transformers import StaticCache

    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
    outs = []
    with vp.patch(model, "10pct") as session:
        for question in questions or ("What is in the picture?",):
            content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            ).to(model.device)  # fmt: skip
            cache.reset()
            out = model.generate(**inputs, past_key_values=cache, max_new_tokens=tokens, **options)
            prompt = inputs["input_ids"].shape[1]
            print(processor.decode(out[0, prompt:], skip_special_tokens=True))
            outs.append(out)
        print(session.stats)
    return outs


if __name__ == "__main__":
    from transformers import AutoModelForImageTextToText, AutoProcessor

    main(
        AutoModelForImageTextToText.from_pretrained(MODEL, dtype="auto", device_map="auto"),
        AutoProcessor.from_pretrained(MODEL),
        *sys.argv[1:],
    )
