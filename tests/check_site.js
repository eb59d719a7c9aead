// Runs inside every page that tests/check_site.py opens and returns what is wrong with it, as a list of texts.
// Text of programs is no formula, and what a closed <details> hides has no size.
(() => {
  const found = [], root = document.documentElement, shown = text => text.trim().replace(/\s+/g, " ").slice(0, 80);
  const name = e => e.tagName.toLowerCase() + (e.id ? "#" + e.id : "") + (e.classList.length ? "." + [...e.classList].join(".") : "");
  if (root.scrollWidth > root.clientWidth + 1) { // one pixel is rounding
    const scrolls = e => { for (; e; e = e.parentElement) if (getComputedStyle(e).overflowX !== "visible") return e; };
    const wide = [...document.body.querySelectorAll("*")].filter(e => {
      const box = e.getBoundingClientRect(), frame = scrolls(e.parentElement);
      return box.width && box.right + scrollX > root.clientWidth + 1 && (!frame || frame === document.body || frame === root);
    });
    const deepest = wide.filter(e => !wide.some(o => o !== e && e.contains(o)));
    found.push(`scrolls sideways: ${root.scrollWidth} > ${root.clientWidth}: `
      + deepest.slice(0, 3).map(e => `${name(e)} "${shown(e.textContent)}"`).join("; "));
  }
  const main = document.querySelector("article, main, #quarto-document-content") || document.body;
  const texts = document.createTreeWalker(main, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const parent = texts.currentNode.parentElement, text = texts.currentNode.textContent;
    if (!parent || parent.closest("pre, code, kbd, samp, script, style, textarea, math, annotation")) continue;
    if (/\$\$|(^|[\s(])\$[^\s$]([^$\n]{0,80}[^\s$])?\$(?!\d)|\\(frac|sum|cdot|text|math\w+|left|right|in|ge|le|times|tau|sigma)\b/.test(text))
      found.push(`formula left as text: ${shown(text)}`);
    if (/\]\([\w./#-]+\)/.test(text)) found.push(`link left as text: ${shown(text)}`);
  }
  for (const formula of main.querySelectorAll("math")) {
    const box = formula.getBoundingClientRect();
    if (!formula.textContent.trim()) found.push("empty formula");
    else if (formula.querySelector("merror")) found.push(`formula with an error: ${shown(formula.textContent)}`);
    else if (!formula.closest("details:not([open])") && formula.checkVisibility() && (!box.width || !box.height))
      found.push(`formula without a size: ${shown(formula.textContent)}`);
  }
  for (const image of main.querySelectorAll("img")) {
    const source = (image.getAttribute("src") || "").slice(0, 60), alt = (image.getAttribute("alt") || "").trim();
    if (!alt || /^\S+\.(png|svg|jpe?g|gif)$/.test(alt)) found.push(`no alternative text: ${source}`);
    if (image.complete && !image.naturalWidth) found.push(`picture does not load: ${source}`);
  }
  for (const drawing of main.querySelectorAll("svg")) {
    const named = drawing.querySelector(":scope > title, :scope > desc") || drawing.closest("[aria-label], [aria-hidden], [aria-labelledby]");
    if (!named && !drawing.closest("button, a, label")) found.push(`drawing without a name: ${name(drawing)}`);
  }
  for (const code of main.querySelectorAll("pre")) { // what does not fit has to wrap or to scroll
    const scrolls = ["auto", "scroll"].includes(getComputedStyle(code).overflowX)
      || code.parentElement && ["auto", "scroll"].includes(getComputedStyle(code.parentElement).overflowX);
    if (code.checkVisibility() && code.scrollWidth > code.clientWidth + 1 && !scrolls)
      found.push(`code is cut off: ${shown(code.textContent)}`);
  }
  const letters = main.querySelector("math mi[mathvariant=script], math mi[mathvariant=bold]"); // MathML Core draws these as plain ones
  if (letters) found.push(`a script or bold letter that looks like a plain one: ${shown(letters.closest("math").textContent)}`);
  const here = document.querySelector("#quarto-sidebar .sidebar-link.active, .sidebar-tree .current-page > a")?.getBoundingClientRect();
  if (innerWidth > 1000 && here && (here.top < 0 || here.bottom > innerHeight)) found.push("the sidebar does not show where one is");
  for (const signature of main.querySelectorAll(".signature")) {
    const text = signature.textContent.trim();
    if (/\]\(|<a |__main__|\*args, \*\*kwargs\)$/.test(text)) found.push(`not a signature: ${shown(text)}`);
  }
  for (const folded of main.querySelectorAll("details.code")) { // methods with a docstring have a heading each
    const made = folded.textContent, known = new Set([...main.querySelectorAll("h2, h3, h4, h5")].map(e => e.textContent.trim().replace(/[#¶]$/, "").trim()));
    for (const [, name] of made.matchAll(/^class ([A-Za-z]\w*)/gm)) if (!known.has(name)) found.push(`class without a heading: ${name}`);
  }
  return found;
})()
