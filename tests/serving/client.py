"""A client of a server of ours, in vLLM's Python, which has the package openai: client.py JSON.

Prints the words of one long answer as they come (`stream`), what a wish that is wrong is refused
with (`refused`), or asks from many threads at once and prints whether each answer was right.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "serving"))
import ask
from openai import BadRequestError, OpenAI

from visionpulse.data import tiny, trail


def main(url, clients=8, questions=16, seed=7, extra=None, stream=False, refused=False):
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
    model = client.models.list().data[0].id
    asked = trail.test_set(seed, questions, tiny.SIDE, "crowded")
    if stream:
        forever = {"ignore_eos": True} | (extra or {})
        for _ in ask.stream_of(client, model, *asked[0], forever, tokens=1500):
            print("word", flush=True)
        return
    if refused:
        message = [{"role": "user", "content": "colour"}]
        try:
            client.chat.completions.create(
                model=model, messages=message, max_tokens=4, extra_body=extra
            )
        except BadRequestError as error:
            print(json.dumps({"status": error.status_code, "said": error.message}))
        return
    with ThreadPoolExecutor(clients) as pool:
        said = list(pool.map(lambda one: ask.ask(client, model, *one, extra), asked))
    words = [len(one.words) for one in said]
    print(json.dumps({"right": [one.is_right for one in said], "words": words}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
