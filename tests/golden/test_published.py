"""Plans of the nine published checkpoints, from headers of their true shapes, against kept ones.

`python tests/published.py tests/golden` writes them anew; a difference is to be understood first.
"""

import json
import time
from pathlib import Path

import pytest

from diffquant import headers, planner
from tests.published import PUBLISHED, Published, checkpoint, module_config, summary

GOLDEN = Path(__file__).parent


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda item: item.name)
def test_plan_is_the_kept_one(published: Published, tmp_path: Path) -> None:
    source = checkpoint(published, tmp_path)
    header = headers.read(source.files)
    made = planner.plan(source, header, config=module_config(published))
    kept = json.loads((GOLDEN / f"{published.name}.plan.json").read_text())
    assert json.loads(json.dumps(summary(made))) == kept


def test_flux2_nvfp4_has_the_tensors_layers_and_bytes_of_the_published_file(tmp_path: Path) -> None:
    # formats_and_peers.md, B2: "21,035,602,376 bytes, 731 tensors … for 144 layers"
    (published,) = (item for item in PUBLISHED if item.name == "flux2-dev-nvfp4")
    (file,) = checkpoint(published, tmp_path).files
    header = headers.read([file])
    layers = json.loads(header.metadata["_quantization_metadata"])["layers"]
    assert (len(header.tensors), len(layers)) == (731, 144)
    # What is left is the spelling of the header: the smallest linear alone has 19 million bytes.
    assert abs(file.stat().st_size - 21_035_602_376) < 10_000


def test_planning_sixty_blocks_takes_less_than_a_second(tmp_path: Path) -> None:
    (published,) = (item for item in PUBLISHED if item.name == "qwen-image-fp8")
    source = checkpoint(published, tmp_path)
    planner.identify(source, headers.read(source.files))  # every format imported
    start = time.process_time()
    planner.plan(source, headers.read(source.files), config=module_config(published))
    assert time.process_time() - start < 1.0


def test_every_golden_plan_belongs_to_a_published_checkpoint() -> None:
    kept = {path.name.removesuffix(".plan.json") for path in GOLDEN.glob("*.plan.json")}
    assert kept == {item.name for item in PUBLISHED}
