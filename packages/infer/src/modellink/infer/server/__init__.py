"""An HTTP server that speaks OpenAI's protocol: app.py the endpoints, protocol.py what they read and write, service.py the thread
that computes, metrics.py what it counts, replicas.py several of them behind one, page.html a page to chat with."""
