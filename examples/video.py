"""A video: long visual context, where a decode step has the most to save.

python examples/video.py clip.mp4 "What happens?"
"""

import sys

import visionpulse as vp

MODEL = "Qwen/Qwen3-VL-4B-Instruct"


def main(model, processor, video, question="What happens in the video?", tokens=128):
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ).to(model.device)  # fmt: skip
    with vp.patch(model, "5pct", schedule="lookback") as session:
        pruned = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        with session.paused():  # the same object, dense
            dense = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        print(session.stats)
    prompt = inputs["input_ids"].shape[1]
    for name, out in (("pruned", pruned), ("dense", dense)):
        print(f"{name}: {processor.decode(out[0, prompt:], skip_special_tokens=True)}")
    return pruned, dense


if __name__ == "__main__":
    from transformers import AutoModelForImageTextToText, AutoProcessor

    main(
        AutoModelForImageTextToText.from_pretrained(MODEL, dtype="auto", device_map="auto"),
        AutoProcessor.from_pretrained(MODEL),
        *sys.argv[1:],
    )
