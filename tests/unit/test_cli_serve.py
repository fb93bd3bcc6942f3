"""`diffquant serve` as a process: it refuses, serves, and leaves when told to."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from diffquant.cli import run
from diffquant.cli._discovered import SUBCOMMANDS


def test_every_model_flag_of_generate_works_here() -> None:
    def flags(command: str) -> set[str]:
        params = SUBCOMMANDS.load(command).params
        return {option for param in params for option in param.opts}

    only_pictures = {"--prompt", "--seed", "--width", "--output-path", "--json"}
    missing = flags("generate") - flags("serve")
    assert only_pictures <= missing
    assert not [name for name in missing if "path" in name and name != "--output-path"]
    assert {"--transformer-path", "--kernel", "--quantization", "--config"} <= flags("serve")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "0.0.0.0"], "lets others in without a key"),
        (["--device", "sm120"], "there is no sm120 here"),
        (["--api-key", "1234"], "too short to be a secret"),
        (["--model-path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--queue-size", "0"], "--queue-size"),
        (["--max-batch", "0"], "--max-batch"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_loaded(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", *words]) in (1, 2)
    assert told in capsys.readouterr().err


def test_what_is_no_certificate_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    for path in (key, certificate):
        path.write_text("-----BEGIN NOTHING-----\n")
    words = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)]
    assert run(["serve", "--port", "0", *words]) == 2
    assert "is no certificate" in capsys.readouterr().err
    assert run(["serve", "--port", "0", *words[:2]]) == 2
    assert "belong together" in capsys.readouterr().err


def test_a_taken_port_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", "--port", str(taken.getsockname()[1])]) == 1
    assert "address already in use" in capsys.readouterr().err.lower()


def wait_until_ready(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=30).close()
        except urllib.error.HTTPError as refused:
            assert refused.code == 503
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server is not ready after 30 seconds")


def test_a_process_serves_until_sigterm_and_finishes_what_it_has() -> None:
    start = "import sys; from diffquant.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", start, "serve", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        try:
            assert process.stderr is not None
            told = iter(process.stderr.readline, "")
            url = next(line for line in told if line.startswith("serving emoji_flux at")).split()[
                -1
            ]
            assert any("26/34 linears fp8" in line for line in told)
            # The line tells what was loaded; one layer is held against the reference after it.
            wait_until_ready(url)
            body = json.dumps({"prompt": "red apple", "stream": True, "progress": True}).encode()
            asked = urllib.request.Request(f"{url}/v1/images/generations", data=body)
            asked.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(asked, timeout=30) as answer:
                answer.readline()
                process.send_signal(signal.SIGTERM)
                rest = answer.read().decode()
            assert "event: image_generation.completed" in rest
            assert process.wait(20) == 0
        finally:
            watchdog.cancel()
            process.kill()
