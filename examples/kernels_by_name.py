"""Our attention and experts by name, where transformers looks implementations up.

python examples/kernels_by_name.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import granite_kernels

name = sys.argv[1] if len(sys.argv) > 1 else "ibm-granite/granite-3.1-1b-a400m-instruct"
device = "cuda" if torch.cuda.is_available() else "cpu"

granite_kernels.register()
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="granite_kernels", experts_implementation="granite_kernels").to(
    device
)

prompt = tokenizer("Feldspar, quartz and", return_tensors="pt").to(device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=16, do_sample=False)[0]))
