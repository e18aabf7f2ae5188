"""The plain process: what a user of the baked checkpoint has, torch and transformers and no bake.

Run as a script, `python -P plain.py REQUEST.json`, never imported by bake. It loads the directory in
its stored dtype, runs the token ids it is given, and writes what it saw: the loading report, the
greedy continuations, and the logits as safetensors. If bake were importable and imported, the
result would prove nothing, so that is checked too.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(
        request["directory"], dtype="auto", output_loading_info=True
    )
    model.eval().to(request["device"])
    logits = {}
    continuations = []
    with torch.no_grad():
        for index, ids in enumerate(request["prompts"]):
            prompt = torch.tensor([ids], device=model.device)
            # A copy of its own: a view would drag the storage of the whole output into the file.
            logits[str(index)] = model(prompt, use_cache=False).logits[0].float().cpu().clone()
        for ids in request["canaries"]:
            prompt = torch.tensor([ids], device=model.device)
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request["new_tokens"],
                min_new_tokens=request["new_tokens"],
                do_sample=False,
                pad_token_id=0,
            )
            continuations.append(output[0, len(ids) :].tolist())
    save_file(logits, request["logits"])
    result = {
        "report": {
            name: sorted(str(entry) for entry in info.get(name, ()))
            for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        },
        "continuations": continuations,
        "bake_imported": any(name.partition(".")[0] == "bake" for name in sys.modules),
    }
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
