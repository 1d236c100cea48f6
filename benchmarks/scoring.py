"""How fast questions are asked, and how soon a large ledger goes on:  python benchmarks/scoring.py --work /tmp/scoring

Asks a server on 127.0.0.1 (a process of its own, which takes 50 ms for an answer) the same questions by a bare loop over the official client
and by live mode with its ledger, 64 at a time, in turn; medians. Then fills a ledger with a million answers and runs `score` on it again,
with ten records that are not answered. Needs 2.5 GB of disk. Prints figures; the last line is JSON. Exit code 1 where live mode reaches less than
80 % of the bare loop, or where the ledger takes 60 s until the first question leaves, or 1 GB of memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import fake_openai

from phased_ift_jax.records import InstructionRecord, Source, Turn
from phased_ift_jax.scoring import difficulty, live, money
from phased_ift_jax.scoring.ledger import Ledger
from phased_ift_jax.scoring.request import Request, Settings

KEY = "sk-benchmark-of-scoring"
QUESTION = difficulty.Settings("gpt-4o-mini", "json_schema")
LEAST_SHARE, MOST_SECONDS, MOST_BYTES = 0.8, 60.0, 1e9


def row(number: int) -> dict[str, str]:
    return {"instruction": f"Add {number} and {number * 7919 % 1_000_003}, and say how you did it.", "input": "", "output": "Digit by digit, " * (number % 20) + "from the right."}


def request(number: int) -> Request:
    turn = row(number)
    return difficulty.request_of(InstructionRecord(str(number), (Turn(turn["instruction"], turn["output"]),), Source("", number)), QUESTION)


async def bare(requests: list[Request], url: str, concurrency: int) -> float:
    import openai

    waiting = iter(requests)
    async with openai.AsyncOpenAI(api_key=KEY, base_url=url, max_retries=0) as client:

        async def work() -> None:
            for request in waiting:
                reply = await client.chat.completions.create(**request.body)
                assert reply.choices[0].message.content

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        return len(requests) / (time.perf_counter() - began)


def ours(requests: list[Request], url: str, concurrency: int, path: Path) -> float:
    path.unlink(missing_ok=True)
    with Ledger(path, KEY) as ledger:
        settings = Settings(KEY, url, concurrency)
        began = time.perf_counter()
        summary = asyncio.run(live.ask(requests, ledger, money.Budget(1000, money.PRICES["gpt-4o-mini"]), settings, difficulty.parser(QUESTION)))
        assert summary.outcomes["ok"] == len(requests), summary
        return len(requests) / (time.perf_counter() - began)


def throughput(work: Path, count: int, rounds: int, latency: float, concurrency: int) -> dict[str, float]:
    found: dict[str, list[float]] = {"bare loop": [], "live mode": []}
    with fake_openai.process(latency=latency) as server:
        for number in range(rounds + 1):
            first = 2 * number * count
            rates = {
                "bare loop": asyncio.run(bare([request(first + n) for n in range(count)], server.url, concurrency)),
                "live mode": ours([request(first + count + n) for n in range(count)], server.url, concurrency, work / "live.jsonl"),
            }
            if number:  # the first round imports
                print("  ".join(f"{name} {rate:.0f} requests/s" for name, rate in rates.items()), flush=True)
                for name, rate in rates.items():
                    found[name].append(rate)
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    return medians | {"share": medians["live mode"] / medians["bare loop"]}


def restart(work: Path, count: int, new: int) -> dict[str, float]:
    data, out = work / "data.jsonl", work / "scored.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row(number)) + "\n" for number in range(count + new))
    print(f"filling a ledger with {count:,} answers", flush=True)
    (work / "scored.ledger.jsonl").unlink(missing_ok=True)
    content = '{"instruction_difficulty": 2.5, "response_difficulty": 1.5}'
    reply = {"id": "chatcmpl-0123456789", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini-2024-07-18", "system_fingerprint": "fp_0123456789"}
    reply |= {"choices": [{"index": 0, "message": {"role": "assistant", "content": content, "refusal": None, "annotations": []}, "finish_reason": "stop", "logprobs": None}]}
    reply |= {"usage": {"prompt_tokens": 1500, "completion_tokens": 20, "total_tokens": 1520, "prompt_tokens_details": {"cached_tokens": 1024, "audio_tokens": 0}}}
    with Ledger(work / "scored.ledger.jsonl") as ledger:
        for number in range(count):
            key = request(number).key
            ledger.sent(key, 1, live.VIA, 0.001)
            ledger.answered(key, 1, live.VIA, usd=0.0001614, reply=reply, final=True, status=200, request_id=f"req_{number:032x}")
    with fake_openai.process() as server:
        words = [sys.executable, "-m", "phased_ift_jax.score", str(data), "--out", str(out), "--model", QUESTION.model, "--base_url", server.url]
        began = time.perf_counter()
        verb = subprocess.Popen(words, env=os.environ | {"OPENAI_API_KEY": KEY}, stderr=subprocess.PIPE, text=True)
        assert verb.stderr
        told = next(line for line in verb.stderr if "to be asked" in line)
        assert f" {new} of them" in told, told
        while not server.counts()["arrivals"]:
            time.sleep(0.05)
        first, cpu = time.perf_counter() - began, sum(map(int, Path(f"/proc/{verb.pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
        verb.stderr.read()
        code = verb.wait()
        whole = time.perf_counter() - began
        assert code == 0
        assert server.counts()["billed"] == new
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {"answers": count, "until_asking_seconds": first, "until_asking_cpu_seconds": cpu, "whole_seconds": whole}
    return figures | {"whole_cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for what it writes, removed at the end")
    parser.add_argument("--requests", type=int, default=2000, help="of each side and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--answers", type=int, default=1_000_000, help="0: leaves the second part out")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    try:
        figures: dict[str, float] = throughput(args.work, args.requests, args.rounds, args.latency, args.concurrency) if args.requests else {}
        if args.answers:
            figures |= restart(args.work, args.answers, 10)
    finally:
        shutil.rmtree(args.work)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    quick = figures.get("until_asking_seconds", 0) < MOST_SECONDS and figures.get("peak_bytes", 0) < MOST_BYTES
    return 0 if figures.get("share", 1) >= LEAST_SHARE and quick else 1


if __name__ == "__main__":
    sys.exit(main())
