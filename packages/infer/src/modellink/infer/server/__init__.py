"""An HTTP server that speaks OpenAI's protocol.

app.py holds the endpoints, body.py and messages.py what they read, protocol.py what they write; service.py is the thread that
computes, metrics.py what it counts, replicas.py several servers behind one (exchange.py is what it has in common with app.py),
page.html a page to chat with.
"""
