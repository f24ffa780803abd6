"""A model for its users: answers in a terminal, and over HTTP.

answering.py        a model that answers conversations and notes which experts it used
server.py           transformers' OpenAI-compatible server for one model, with
chat_handler.py     what it does differently for a single request, and
continuous.py       texts of many requests in one running batch; behind
request_guard.py    which reads a request's body within a limit, before anything else sees it, and
request_checks.py   which knows what a request may say
"""
