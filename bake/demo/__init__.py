"""The small model that ships with bake: the grammar of its text, its training script, its files.

The model is a stand-in for a real one where nothing can be downloaded: tests, `bake demo` and the
examples steer it along one axis of behaviour that can be counted (cheerful or gloomy words).
"""

from pathlib import Path

#: The directory that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` load.
MODEL: Path = Path(__file__).parent / "model"
