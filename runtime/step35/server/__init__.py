"""The local server: the three APIs that agents and chat front ends speak, on one engine."""
