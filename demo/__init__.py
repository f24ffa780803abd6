"""A web page for a model: `unimoe demo`.

settings.py      what may be set
answer_line.py   one model, many people: who asks waits in line, and may leave it
conversation.py  what was said, for the model and for the page; errors as plain sentences
expert_panel.py  which experts the last answer used
examples.py      questions to begin with, from the starter corpus
page.py          the page itself, of Gradio's parts
look.py          its colours and sizes
uploads.py       the folder of uploads: what lies in it, and how much it may hold
guard.py         stands before everything: which requests are let through, how long they may be
login.py         the password, where one is asked for
hosting.py       stops in order while pages are open
server.py        puts them together and serves them
"""
