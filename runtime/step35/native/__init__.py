"""llama.cpp through llama-cpp-python: the one folder that talks to it, and which build of it runs."""
