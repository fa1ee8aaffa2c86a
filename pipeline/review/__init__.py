"""Review page: one HTML file in which a person looks at doubtful records beside their pages and corrects them.

output folder -> documents.ReviewDocument, most doubtful first -> pages, drawn again -> page.html with all of it inside
"""
