"""A model for its users: answers in a terminal, and over HTTP.

answering.py        a model that answers conversations and notes which experts it used
media_needs.py      what long media will take, said beforehand, from
media_lengths.py    their headers and
tracked_memory.py   going through the model without computing
sight.py            other vision models look at images for models with mixers
freed_memory.py     gives back what is freed
server.py           transformers' OpenAI-compatible server for one model, with
chat_handler.py     what it does differently for a single request,
later_inputs.py     (media are decoded in threads),
event_stream.py     (what a stream begins and ends with), and
continuous.py       texts of many requests in one running batch; behind
request_guard.py    which reads a request's body within a limit, before anything else sees it, and
request_checks.py   which knows what a request may say, with
asgi.py             what it shares with the guards of the demo
"""
