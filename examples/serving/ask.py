"""Ask a server about drawn pictures over the OpenAI API, streaming, and check its answers.

python examples/serving/ask.py --url http://127.0.0.1:8000/v1 --clients 8 --questions 16
"""

import argparse
import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from openai import OpenAI
from PIL import Image

from visionpulse.data import tiny, trail


class Said(NamedTuple):
    words: list[str]
    is_right: bool
    seconds: list[float]  # from the request to each word


def url_of(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture.pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def stream_of(client, model, picture, question, extra=None, tokens=trail.LONGEST_ANSWER):
    """The streamed answer to one question."""
    content = [
        {"type": "image_url", "image_url": {"url": url_of(picture)}},
        {"type": "text", "text": " ".join(trail.words(question.prompt))},
    ]
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], stream=True,
        temperature=0, max_tokens=tokens,
        extra_body={"skip_special_tokens": False} | (extra or {}),
    )  # fmt: skip


def ask(client, model, picture, question, extra=None):
    begun, seconds, said = time.monotonic(), [], ""
    for chunk in stream_of(client, model, picture, question, extra):
        if chunk.choices and chunk.choices[0].delta.content:
            said += chunk.choices[0].delta.content
            seconds.append(time.monotonic() - begun)
    wanted = trail.words(tiny.until_end(question.answer))
    words = said.split()
    return Said(words, words == wanted or [*words, wanted[-1]] == wanted, seconds)


def main(url="http://127.0.0.1:8000/v1", clients=8, questions=16, seed=7):
    client = OpenAI(base_url=url, api_key="none", timeout=600)
    model = client.models.list().data[0].id
    asked = trail.test_set(seed, questions, tiny.SIDE, "crowded")
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda one: ask(client, model, *one), asked))
    right = sum(said.is_right for said in answers)
    print(f"{right} of {questions} right; the first: {' '.join(answers[0].words)}")
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--questions", type=int, default=16)
    main(**vars(parser.parse_args()))
