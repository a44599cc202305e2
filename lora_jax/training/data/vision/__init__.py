"""Labelled images, and images in chats."""
