"""A Hugging Face Space: the page of `diffsal serve`, for weights.pt, or for the demo's digits."""

from pathlib import Path

from PIL import Image

from diffsal import load_model
from diffsal.demo import digits, write_digits_demo
from diffsal.serving.run import serve


def main(folder: Path = Path(), port: int = 7860) -> None:
    """Serve the folder's weights and images; where it has no weights, make the demo's."""
    weights = folder / "weights.pt"
    if not weights.exists():
        write_digits_demo(folder)
        held_out = digits()[1]
        for number in range(5):
            Image.fromarray(held_out.images[number]).save(folder / f"digit-{number}.png")
    serve(load_model(weights), host="0.0.0.0", port=port, examples=sorted(folder.glob("*.png")))


if __name__ == "__main__":
    main()
