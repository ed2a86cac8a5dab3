"""Ask a server for the tail of a model with NVIDIA's client. The names of the tensors decide which part is run.

torchsurgeon serve alexnet=torchvision:alexnet
pip install 'tritonclient[http]'
python any_client.py --server 127.0.0.1:8000 --model alexnet --spec torchvision:alexnet --cut features.12
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import tritonclient.http as triton

import torchsurgeon as ts
from torchsurgeon.models import specs


def ask(client: triton.InferenceServerClient, model: str, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Send named tensors, and return the model's first output."""
    inputs = []
    for name, array in tensors.items():
        one = triton.InferInput(name, list(array.shape), triton.np_to_triton_dtype(array.dtype))
        one.set_data_from_numpy(array)
        inputs.append(one)
    answer = client.infer(model, inputs)
    return answer.as_numpy(answer.get_response()["outputs"][0]["name"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", default="127.0.0.1:8000", help="the server's address, without http://")
    parser.add_argument("--model", default="alexnet", help="the name under which it serves the model")
    parser.add_argument("--spec", default="torchvision:alexnet", help="the SPEC that the server has for this name")
    parser.add_argument("--cut", default="features.12", help="the last layer that runs on this device")
    options = parser.parse_args()

    client = triton.InferenceServerClient(options.server)
    metadata = client.get_model_metadata(options.model)
    print("inputs:", *(f"{entry['name']} {entry['datatype']} {entry['shape']}" for entry in metadata["inputs"]))

    loaded = specs.load(options.spec)
    part = ts.cut(ts.trace(loaded.model, *loaded.args), options.cut)
    with torch.no_grad():
        boundary = part.head(*loaded.args)
    sent = {spec.name: tensor.numpy() for spec, tensor in zip(part.point.tensors, boundary, strict=True)}
    # The server runs the rest of the model in one case, and all of it in the other.
    tail = ask(client, options.model, sent)
    whole = ask(client, options.model, {metadata["inputs"][0]["name"]: loaded.args[0].numpy()})
    print(f"sent {', '.join(sent)}: {sum(array.nbytes for array in sent.values())} bytes,", end=" ")
    print(f"instead of {metadata['inputs'][0]['name']}: {loaded.args[0].nbytes}")
    assert np.array_equal(tail, whole)
    print("both ways give the same answer, class", int(tail.argmax()))
    client.close()


if __name__ == "__main__":
    main()
