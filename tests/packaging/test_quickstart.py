"""The quickstart runs from end to end, and says in one sentence what is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def quickstart(*arguments):
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_quickstart_trains_compares_times_and_draws(tmp_path):
    photo, picture = tmp_path / "photo.png", tmp_path / "new folder" / "picture.png"
    Image.radial_gradient("L").resize((96, 64)).convert("RGB").save(photo)
    small = ("--steps", "2", "--short-side", "160")
    result = quickstart("--image", photo, "--output", picture, *small)
    assert result.returncode == 0, result.stderr
    assert "step 2 of 2" in result.stdout
    ratios = [float(ratio) for ratio in re.findall(r"ratio (\S+)$", result.stdout, re.MULTILINE)]
    assert len(ratios) == 4  # attention and layer, forward and forward + backward
    assert min(ratios) > 0
    assert result.stdout.splitlines()[-1].endswith(str(picture))
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width >= 1000 and drawn.height >= 500
        assert len(drawn.convert("RGB").getcolors(maxcolors=1 << 24)) > 100
    page = picture.with_suffix(".html")
    assert str(page) in result.stdout
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    (layer,) = data["layers"]
    assert layer["isGrid"] and layer["count"] == layer["total"]
    assert len(data["boxes"]) == 4 and data["start"] == data["boxes"][0]["query"]


@pytest.mark.parametrize("content", [None, b"no image"], ids=["missing", "unreadable"])
def test_quickstart_names_the_image_it_cannot_read(tmp_path, content):
    photo = tmp_path / "photo.png"
    if content is not None:
        photo.write_bytes(content)
    result = quickstart("--image", photo, "--output", tmp_path / "picture.png")
    assert result.returncode == 1
    assert result.stderr.startswith(f"Cannot read the image {photo}: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "picture.png").exists()
