"""A model over HTTP: transformers' OpenAI-compatible server behind a guard that answers bad requests with 4xx.

request_checks.py   what a request may say
request_guard.py    reads a request's body within a limit, before anything else sees it
server.py           transformers' server with the guard, for one model
"""
