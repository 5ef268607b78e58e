"""`make demo` and `make demo-chat`: a small model that speaks, with a quarter of its experts cached.

``model`` gets the model, ``serving`` serves it and asks it, ``figures`` says what that cost;
``__main__`` is the demo, ``chat`` the conversation. Everything lies under demo/.
"""
