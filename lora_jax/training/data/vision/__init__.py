"""Images of classes, and images in chats."""
