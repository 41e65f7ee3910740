# SPDX-License-Identifier: Apache-2.0
"""An HTTP server with OpenAI's API.

app.py holds the endpoints; body.py and messages.py read requests, protocol.py writes responses; service.py is
the thread that runs the batch, metrics.py counts; front.py and replicas.py put several servers behind one
address; http.py is what both kinds of server share; page.html is a chat page.
"""
