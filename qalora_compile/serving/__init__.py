"""Conversations with exported models, and a server for them with the OpenAI API."""
