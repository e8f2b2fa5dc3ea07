"""Our own class where transformers expects one of its own: pipeline, streamers, beams, prompt lookup.

python examples/ours_in_transformers_places.py [MODEL]
"""

import sys
from threading import Thread

from transformers import AutoTokenizer, TextIteratorStreamer, pipeline

from granite_kernels import GraniteForCausalLM

name = sys.argv[1] if len(sys.argv) > 1 else "ibm-granite/granite-3.1-2b-instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = GraniteForCausalLM.from_pretrained(name).as_transformers()  # a view, without a copy

pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
chat = [{"role": "user", "content": "What is feldspar?"}]
print(pipe(chat, max_new_tokens=32, do_sample=False)[0]["generated_text"][-1])

prompt = tokenizer("Quartz and feldspar, mica and quartz and", return_tensors="pt").to(model.device)
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
Thread(target=model.generate, kwargs={**prompt, "max_new_tokens": 16, "streamer": streamer}).start()
for piece in streamer:
    print(piece, end="", flush=True)
print()

for how in ({"num_beams": 4}, {"prompt_lookup_num_tokens": 3}):
    print(how, tokenizer.decode(model.generate(**prompt, max_new_tokens=16, **how)[0]))
