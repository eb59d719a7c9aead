const make = (tag, fields, ...children) => {
  const element = Object.assign(document.createElement(tag), fields)
  element.append(...children)
  return element
}

const start = host => {
  const data = JSON.parse(host.querySelector("script").textContent), all = 2 ** data.classes.length - 1
  const root = host.attachShadow({mode: "open"}), part = name => root.querySelector("." + name)
  root.append(host.querySelector("template").content.cloneNode(true))
  let bits = data.chosen
  const buttons = data.classes.map((name, c) => make("button", {type: "button", onclick: () => show(bits ^ 1 << c)},
    ...(data.pictures ? [make("img", {src: data.pictures[c], alt: ""})] : []), name))
  const layers = data.layers.map(({units}) => units.map(unit =>
    make("i", {title: `kept by ${names(data, unit) || "none"}`})))
  const labels = layers.map(() => make("span"))
  const rows = layers.map(cells => make("div", {className: "cells"}, ...cells))
  rows.forEach(row => row.setAttribute("role", "img"))
  part("classes").append(...buttons)
  part("layers").append(...rows.flatMap((row, at) => [labels[at], row]))
  part("none").onclick = () => show(0)
  part("all").onclick = () => show(all)
  part("chance").onclick = () => {
    const known = Object.keys(data.rows).map(Number).filter(other => other != bits)
    if (known.length) show(known[Math.floor(Math.random() * known.length)])
  }

  const show = chosen => {
    bits = chosen
    buttons.forEach((button, c) => button.setAttribute("aria-pressed", Boolean(bits >> c & 1)))
    keepers(data, bits).forEach((kept, at) => {
      kept.forEach((n, unit) => layers[at][unit].className = n > 1 ? "several" : n ? "one" : "")
      labels[at].textContent = `${at + 1}: ${kept.filter(n => n).length} of ${kept.length}`
      rows[at].setAttribute("aria-label", summary(data.layers[at], at + 1, kept))
    })
    const {text, meters = []} = answer(data, bits)
    part("text").textContent = text
    part("meters").replaceChildren(...meters.map(([name, fraction, value], at) => {
      const bar = make("b", {className: at < 2 ? "cost" : ""})
      bar.style.width = `${100 * fraction}%`
      return make("p", {}, make("span", {}, name), make("span", {}, value), make("div", {}, bar))
    }))
  }
  show(bits)
}

for (const host of document.querySelectorAll(".modnb-explorer")) if (!host.shadowRoot) start(host)
