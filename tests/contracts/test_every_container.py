"""What every container keeps to. A new one brings a true file: tests/data/headers/<name>.<suffix>."""

from pathlib import Path

import pytest

from diffquant.errors import HeaderError
from diffquant.headers import CONTAINERS, Header, read

every_container = pytest.mark.parametrize("name", CONTAINERS.names())


@pytest.fixture
def sample(data: Path, name: str) -> Path:
    return next((data / "headers").glob(f"{name}.*"))


@every_container
def test_exactly_one_container_recognizes_a_true_file(name: str, sample: Path) -> None:
    first = sample.read_bytes()[:64]
    claims = [
        one for one, container in CONTAINERS.load_all().items() if container.recognizes(first)
    ]
    assert claims == [name]


@every_container
def test_tensors_lie_in_the_file_in_order_and_apart(sample: Path) -> None:
    tensors = list(read([sample]).tensors.values())
    ends = [0, *(tensor.stop for tensor in tensors)]
    assert len(tensors) >= 4
    assert all(tensor.start >= end for tensor, end in zip(tensors, ends, strict=False))
    assert ends[-1] <= sample.stat().st_size


@every_container
def test_tensors_and_metadata_are_plain_data(sample: Path) -> None:
    header = read([sample])
    assert all(type(size) is int for one in header.tensors.values() for size in one.shape)
    assert all(type(word) is str for pair in header.metadata.items() for word in pair)


@every_container
def test_a_second_file_gets_the_second_index(sample: Path) -> None:
    container = CONTAINERS.load_all()[sample.stem]
    tensors, _ = container.read(sample, 1)
    assert {tensor.file for tensor in tensors} == {1}


@every_container
def test_a_truncated_file_is_refused_wherever_it_breaks(sample: Path, tmp_path: Path) -> None:
    whole, data_ends = sample.read_bytes(), _data_ends(read([sample]))
    broken = tmp_path / sample.name
    for length in range(0, data_ends, 7):
        broken.write_bytes(whole[:length])
        with pytest.raises(HeaderError):
            read([broken])


@every_container
def test_a_flipped_byte_is_refused_or_harmless_never_a_crash(sample: Path, tmp_path: Path) -> None:
    whole = sample.read_bytes()
    broken, refused = tmp_path / sample.name, 0
    for place in range(0, min(400, len(whole)), 3):
        broken.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read([broken])
        except HeaderError:
            refused += 1
    assert refused > 10


def _data_ends(header: Header) -> int:
    return max(tensor.stop for tensor in header.tensors.values())
