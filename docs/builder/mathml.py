"""An extension of Python-Markdown: what arithmatex found becomes MathML, which browsers show by themselves. No script and no font is fetched."""

import html
import re

from latex2mathml.converter import convert
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor


FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


class MathML(Postprocessor):
    def run(self, text):
        def formula(found):
            return convert(html.unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline")

        return FORMULA.sub(formula, text)


class MathMLExtension(Extension):
    def extendMarkdown(self, md):
        md.postprocessors.register(MathML(md), "mathml", -10)  # after raw HTML was put back


def makeExtension(**settings):
    return MathMLExtension(**settings)
